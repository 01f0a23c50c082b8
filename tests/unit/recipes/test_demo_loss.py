import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from recipes.demo.loss import causal_lm_loss


@pytest.mark.parametrize("num_items", [None, 37, torch.tensor(37)])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_value_and_gradient_are_those_of_the_models_own_loss(num_items, shifted):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 50, 8, generator=generator)
    head = torch.randn(19, 8, generator=generator) * 3
    labels = torch.randint(19, (3, 50), generator=generator)
    labels[0, :20] = labels[2, -5:] = -100
    given = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}

    def run(loss_function):
        leaf, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logits = torch.nn.functional.linear(leaf, weight)
        loss = loss_function(logits=logits, vocab_size=19, num_items_in_batch=num_items, **given)
        loss.mul(0.7).backward()
        return loss.detach(), leaf.grad, weight.grad

    for ours, stock in zip(run(causal_lm_loss), run(ForCausalLMLoss), strict=True):
        torch.testing.assert_close(ours, stock)  # the stock loss is in float32 whatever it is given


def test_the_backward_pass_makes_no_second_tensor_of_the_logits_size():
    logits = torch.randn(1, 256, 512, requires_grad=True) * 1
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.untyped_storage().data_ptr()))
    causal_lm_loss(logits, torch.randint(512, (1, 256)), 512).backward()
    assert seen == [logits.untyped_storage().data_ptr()]


def test_without_gradients_the_logits_stay():
    logits = torch.randn(1, 9, 7)
    before = logits.clone()
    labels = torch.randint(7, (1, 9))
    assert causal_lm_loss(logits, labels, 7) == ForCausalLMLoss(logits, labels, 7)
    assert torch.equal(logits, before)
