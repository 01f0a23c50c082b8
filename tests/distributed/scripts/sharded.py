"""A rank without images among FSDP2 shards: with a dummy image it runs the collectives of the encoder like the others.

Gradients of the sharded model equal those of a whole one that sees all samples, without dummy. With `bare`, the
dummy is left out, to see that the ranks then wait for each other until the time-out, or tear each other down.
"""

import datetime
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from hf_dflop.data import VisionLanguageCollator
from tests.distributed.chats import chat_processor, conversations, model

WORLD = int(os.environ["EXPECTED_WORLD_SIZE"])


def backward(net: torch.nn.Module, batches: list[dict[str, Any]], count: int) -> None:
    for batch in batches:
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        net(**batch, num_items_in_batch=torch.tensor(count)).loss.backward()


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=15))
    rank = dist.get_rank()
    plain = VisionLanguageCollator(chat_processor())
    collate = VisionLanguageCollator(chat_processor(), dummy_image=sys.argv[1:] != ["bare"])
    texts, pictures = conversations(8, with_images=0.0), conversations(8)
    # slot 0: rank 0 has no image; slot 1: no rank has one
    microbatches = [
        [[texts[i] for i in (0, 1)], [texts[i] for i in (2, 3)]],
        [[pictures[i] for i in (0, 1)], [texts[i] for i in (4, 5, 6)]],
    ]
    count = sum(int((plain(m)["labels"][:, 1:] != -100).sum()) for slots in microbatches for m in slots)

    whole = model(chat_processor()).double()
    backward(whole, [plain(m) for slots in microbatches for m in slots], count)
    net = model(chat_processor()).double()
    for module in [*net.model.vision_tower.modules(), *net.model.language_model.modules()]:
        if type(module).__name__ in ("CLIPEncoderLayer", "LlamaDecoderLayer"):
            fully_shard(module)
    fully_shard(net)
    batches = [collate(m) for m in microbatches[rank]]
    backward(net, batches, count)

    expected = dict(whole.named_parameters())
    worst, size = 0.0, 0.0
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            found = parameter.grad.full_tensor() * WORLD  # FSDP takes the mean over ranks
            reference = expected[name].grad
            worst = max(worst, float((found - (0 if reference is None else reference)).abs().max()))
            size = max(size, float(found.abs().max()))
        else:
            assert expected[name].grad is None, name
    assert worst <= 1e-14 < 1e-3 < size, (worst, size)
    print(f"sharded: {worst:.1e} of {size:.1e}")
    dist.destroy_process_group()
