"""Help pages become interleaved samples: order of blocks, what is dropped, how pages are cut and divided."""

from pathlib import Path

import pytest
from PIL import Image

from recipes.demo.documents import DocumentLimits, build_documents, pieces_of, split_pages
from recipes.demo.html_pages import Block, Page, read_page

PAGE = """<html><head><title>4.4. Crop</title></head><body>
<div class="navheader"><table><tr><td><img src="images/prev.png" alt="Prev"/></td><td>Tools</td></tr></table></div>
<div class="sect2"><h3 class="title"><a id="x"></a>4.4. Crop</h3>
<p class="title"><strong>Figure 1. Crop tool</strong></p>
<img src="images/crop.png" alt="Crop tool" />
<p>Clip the <em>image</em>
   to a rectangle &amp; keep it. {filler}</p>
<div class="note"><img alt="[Note]" src="images/note.png"/><p>Press <img src="images/tiny.png" alt="Enter"/>.</p></div>
<h4>4.4.1. Options</h4>
<ul><li><p>Highlight</p></li><li><p>Before the picture.</p>
<img src="images/options.png" alt="Crop options"></li></ul>
<img src="images/missing.png" alt="gone"/>
</div><div class="navfooter"><p>Next page</p></div></body></html>"""


@pytest.fixture
def help_folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    sizes = {"crop": (64, 48), "options": (40, 90), "tiny": (16, 16), "prev": (64, 64), "note": (48, 48)}
    for i, (name, size) in enumerate(sizes.items()):
        Image.new("RGB", size, (i * 20, 0, 0)).save(tmp_path / "images" / f"{name}.png")
    for i in range(8):
        page = PAGE.format(filler="More about cropping in this program. " * (4 + 3 * i))
        (tmp_path / f"page{i}.html").write_text(page, encoding="utf-8")
    (tmp_path / "genindex.html").write_text("<html><body><p>Index of everything</p></body></html>")
    return tmp_path


def page_of(*blocks: Block, title: str = "Crop") -> Page:
    return Page(name="crop", title=title, blocks=blocks)


def text(length: int) -> Block:
    return Block(kind="text", text=("word " * length)[: length - 1] + ".")


def figure() -> Block:
    return Block(kind="image", image=Path("picture.png"))


def heading(title: str) -> Block:
    return Block(kind="heading", text=title, level=4)


def test_blocks_come_in_reading_order_without_navigation(help_folder: Path) -> None:
    page = read_page(help_folder / "page0.html", help_folder)
    assert page is not None
    assert page.title == "Crop"
    found = [(block.kind, block.image.name if block.image else block.text[:40].strip()) for block in page.blocks]
    assert found == [
        ("heading", "Crop"),
        ("text", "Figure 1. Crop tool"),  # the alt text says the same and is left out
        ("image", "crop.png"),
        ("text", "Clip the image to a rectangle & keep it."),
        ("text", "Press Enter ."),  # too small for a figure: its alt text stays in the sentence
        ("heading", "Options"),
        ("text", "Highlight"),
        ("text", "Before the picture."),
        ("text", "Crop options"),
        ("image", "options.png"),
        ("text", "gone"),
    ]


def test_an_index_is_no_page(help_folder: Path) -> None:
    assert read_page(help_folder / "genindex.html", help_folder) is None


def test_a_sample_has_its_images_where_the_page_has_them(help_folder: Path) -> None:
    documents = build_documents(help_folder)
    rows = [row for split in documents.values() for row in split if row["id"] == "page0#0"]
    assert len(rows) == 1
    user, assistant = rows[0]["messages"]
    assert user["content"] == [{"type": "text", "text": "Write the help page ‘Crop’."}]
    assert [part["type"] for part in assistant["content"]] == ["text", "image", "text"]
    assert assistant["content"][0]["text"] == "Crop\nFigure 1. Crop tool\n"
    assert assistant["content"][2]["text"].startswith("\nClip the image")
    assert [image.size for image in rows[0]["images"]] == [(64, 48)]


def test_every_section_is_a_sample_and_short_ones_join_the_next() -> None:
    limits = DocumentLimits(join_chars=100)
    page = page_of(heading("Crop"), text(30), heading("Use"), text(200), heading("End"), text(150))
    pieces = pieces_of(page, limits)
    assert [prompt for prompt, _ in pieces] == [
        "Write the help page ‘Crop’.",
        "Write the section ‘End’ of the help page ‘Crop’.",
    ]
    assert [block.text for block in pieces[0][1] if block.kind == "heading"] == ["Crop", "Use"]


def test_only_what_is_over_a_limit_is_split() -> None:
    limits = DocumentLimits(max_chars=1000, max_images=2)
    within = page_of(heading("Crop"), text(990), figure(), figure())
    assert len(pieces_of(within, limits)) == 1

    long = page_of(heading("Crop"), *[text(400) for _ in range(6)], figure(), figure(), figure())
    pieces = pieces_of(long, limits)
    lengths = [sum(len(block.text) for block in blocks) for _, blocks in pieces]
    assert max(lengths) <= 1000
    assert max(sum(block.kind == "image" for block in blocks) for _, blocks in pieces) == 2
    assert [block for _, blocks in pieces for block in blocks] == list(long.blocks)  # nothing lost or moved
    assert pieces[1][0] == "Continue the help page ‘Crop’."


def test_a_block_over_the_limit_is_cut_between_words() -> None:
    limits = DocumentLimits(max_chars=300)
    pieces = pieces_of(page_of(text(1000)), limits)
    texts = [block.text for _, blocks in pieces for block in blocks]
    assert max(map(len, texts)) <= 300
    assert " ".join(texts) == text(1000).text


def test_a_heading_stays_with_the_block_after_it() -> None:
    limits = DocumentLimits(max_chars=300, join_chars=250)
    pieces = pieces_of(page_of(text(240), heading("Next"), text(200)), limits)
    assert [block.kind for _, blocks in pieces for block in blocks] == ["text", "heading", "text"]
    assert pieces[1][1][0].kind == "heading"


def test_short_text_alone_is_dropped_but_not_with_a_figure() -> None:
    limits = DocumentLimits(min_chars=40)
    assert pieces_of(page_of(heading("Crop"), text(20)), limits) == []
    assert len(pieces_of(page_of(heading("Crop"), text(20), figure()), limits)) == 1


def test_splits_share_no_page_and_do_not_change_between_runs(help_folder: Path) -> None:
    first, second = (build_documents(help_folder, limits=DocumentLimits(eval_fraction=0.25)) for _ in range(2))
    train, held_out = set(first["train"]["page"]), set(first["eval"]["page"])
    assert len(held_out) == 2
    assert not train & held_out
    assert train | held_out == {f"page{i}" for i in range(8)}
    for split in first:
        assert first[split]["id"] == second[split]["id"]
        assert first[split]["messages"] == second[split]["messages"]


def test_the_division_of_pages_ignores_their_order() -> None:
    names = [f"page{i}" for i in range(30)]
    assert split_pages(names, eval_fraction=0.1, seed=3) == split_pages(names[::-1], eval_fraction=0.1, seed=3)
    assert split_pages(names, eval_fraction=0.1, seed=3) != split_pages(names, eval_fraction=0.1, seed=4)


def test_images_are_embedded(help_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from datasets import load_from_disk

    saved = tmp_path_factory.mktemp("saved") / "documents"
    build_documents(help_folder).save_to_disk(str(saved))
    for picture in (help_folder / "images").iterdir():
        picture.unlink()
    assert load_from_disk(str(saved))["train"][0]["images"][0].mode == "RGB"


def test_a_folder_without_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 usable HTML pages"):
        build_documents(tmp_path)


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="max_chars=30"):
        DocumentLimits(max_chars=30)
