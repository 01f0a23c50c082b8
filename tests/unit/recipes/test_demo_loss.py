import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.demo.loss import fuse_loss


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, tie_word_embeddings=True, **sizes))


@pytest.mark.parametrize("num_items", [None, 37, torch.tensor(37)])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_value_and_all_gradients_are_those_of_the_models_own_loss(num_items, is_frozen):
    stock = build()
    stock.get_input_embeddings().requires_grad_(not is_frozen)
    fused = copy.deepcopy(stock)
    fuse_loss(fused)
    fused = copy.deepcopy(fused)  # the weight is the copy's own
    ids = torch.randint(53, (3, 300), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :200] = labels[2, -50:] = -100
    losses = []
    for model in (stock, fused):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=num_items).loss
        (loss * 0.7).backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert float((ours.grad - theirs.grad).norm()) <= 1e-5 * float(theirs.grad.norm()), name


def test_evaluation_sees_logits():
    stock = build()
    fused = copy.deepcopy(stock)
    fuse_loss(fused)
    ids = torch.randint(53, (2, 9))
    with torch.no_grad():
        ours, theirs = fused(input_ids=ids, labels=ids), stock(input_ids=ids, labels=ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.loss == theirs.loss
