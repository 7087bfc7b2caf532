"""The sparse and the piecewise loss are the plain cross-entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from shared_bert.modeling import losses
from tests.conftest import tiny_model


@pytest.fixture
def labels(input_ids):
    return input_ids.masked_fill(input_ids % 4 > 0, -100)


@pytest.mark.parametrize("num_predictions", [None, 12, 24, 100])
def test_sparse_head_is_the_dense_head(input_ids, labels, num_predictions):
    model = tiny_model("bert").double()
    logits = model(input_ids).logits
    dense = cross_entropy(logits.flatten(0, 1), labels.flatten())
    model.train()
    out = model(input_ids, labels=labels, num_predictions=num_predictions)
    assert out.logits is None
    torch.testing.assert_close(out.loss.double(), dense, rtol=1e-6, atol=1e-6)
    sparse_gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    for got, expected in zip(sparse_gradients, torch.autograd.grad(dense, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_causal_loss_is_the_shifted_cross_entropy(input_ids, labels):
    model = tiny_model("gpt")
    out = model(input_ids, labels=labels)
    expected = cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert model.train()(input_ids, labels=labels).logits is None
    assert model(input_ids, labels=labels, skip_logits=False).logits.shape == (2, 12, 99)


def test_accumulated_batches_share_one_mean(kind, input_ids, labels):
    """Two half batches, each divided by the count of both, add up to the whole batch."""
    model = tiny_model(kind).train()
    whole = model(input_ids, labels=labels).loss
    predicted = labels if kind == "bert" else labels[:, 1:]
    count = (predicted != -100).sum()
    halves = [
        model(i, labels=target, num_items_in_batch=count).loss
        for i, target in zip(input_ids.split(1), labels.split(1), strict=True)
    ]
    torch.testing.assert_close(sum(halves), whole)


class Doubled(torch.nn.Linear):
    """Stands for an adapter: the parameters alone do not say what it does."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("head_class", [torch.nn.Linear, Doubled])
def test_pieces_make_the_whole(monkeypatch, head_class, with_bias):
    torch.manual_seed(0)
    head = head_class(8, 31, bias=with_bias)
    hidden = torch.randn(23, 8, requires_grad=True)
    labels = torch.randint(31, (23,)).masked_fill(torch.arange(23) % 3 == 0, -100)
    inputs = [hidden, *head.parameters()]
    expected = cross_entropy(head(hidden), labels)
    monkeypatch.setitem(losses.MAX_LOGITS, "cpu", 31 * 5)
    got = losses.linear_cross_entropy(hidden, head, labels)
    torch.testing.assert_close(got, expected)
    pairs = zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for got_gradient, expected_gradient in pairs:
        torch.testing.assert_close(got_gradient, expected_gradient)


def test_the_loss_is_that_of_the_logits_whatever_the_head_does(kind, input_ids, labels):
    """Hooks on the head take part in the loss, weight normalisation among them."""
    model = tiny_model(kind).train()
    head = model.get_output_embeddings()
    torch.nn.init.normal_(head.weight, std=0.1)  # the padding token's row of zeros has no norm
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(head)
    with torch.no_grad():
        head.weight_g.mul_(2)
    head.register_forward_hook(lambda module, inputs, logits: logits.tanh())
    out = model(input_ids, labels=labels, skip_logits=False)
    ahead = 0 if kind == "bert" else 1
    expected = cross_entropy(out.logits[:, : 12 - ahead].flatten(0, 1), labels[:, ahead:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert head.weight_g.grad.any()


@pytest.mark.parametrize("training", [False, True])
def test_torch_func(kind, input_ids, labels, training):
    """Gradients by `torch.func`, of the whole batch and row by row, are those of autograd."""
    model = tiny_model(kind, attn_implementation="eager").train(training)
    parameters = dict(model.named_parameters())

    def loss(parameters, input_ids, labels):
        return torch.func.functional_call(model, parameters, (input_ids,), {"labels": labels}).loss

    def by_autograd(*batch):
        gradients = torch.autograd.grad(model(batch[0], labels=batch[1]).loss, parameters.values())
        return dict(zip(parameters, gradients, strict=True))

    whole = torch.func.grad(loss)(parameters, input_ids, labels)
    torch.testing.assert_close(whole, by_autograd(input_ids, labels))
    rows = input_ids[:, None], labels[:, None]
    by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, *rows)
    for i, row in enumerate(zip(*rows, strict=True)):
        torch.testing.assert_close({name: g[i] for name, g in by_row.items()}, by_autograd(*row))

    # The parameters by closure: the head's own rule.
    embeddings = model.get_input_embeddings()(input_ids).detach()

    def of_embeddings(embeddings, labels):
        return model(inputs_embeds=embeddings, labels=labels).loss

    variable = embeddings.clone().requires_grad_()
    (expected,) = torch.autograd.grad(of_embeddings(variable, labels), variable)
    torch.testing.assert_close(torch.func.grad(of_embeddings)(embeddings, labels), expected)
    losses_of_rows = torch.func.vmap(of_embeddings)(embeddings[:, None], labels[:, None])
    for i in range(2):
        torch.testing.assert_close(losses_of_rows[i], of_embeddings(embeddings[i : i + 1], labels[i : i + 1]))


def test_higher_derivatives_by_torch_func(kind, input_ids, labels):
    """Along a direction, the derivative of the loss and of its gradient are those of finite differences."""
    model = tiny_model(kind, attn_implementation="eager").double().train()
    embeddings = model.get_input_embeddings()(input_ids).detach()
    direction = torch.randn_like(embeddings)

    def loss(embeddings):
        return model(inputs_embeds=embeddings, labels=labels).loss

    gradient = torch.func.grad(loss)
    _, slope = torch.func.jvp(loss, (embeddings,), (direction,))
    torch.testing.assert_close(slope, (gradient(embeddings) * direction).sum())
    _, curvature = torch.func.jvp(gradient, (embeddings,), (direction,))
    step = 1e-5 * direction
    differences = (gradient(embeddings + step) - gradient(embeddings - step)) / 2e-5
    torch.testing.assert_close(curvature, differences, rtol=1e-4, atol=1e-7)


@pytest.fixture
def head():
    """A head, and the hidden states and labels of a loss."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 31)
    hidden = torch.randn(23, 8, requires_grad=True)
    labels = torch.randint(31, (23,)).masked_fill(torch.arange(23) % 3 == 0, -100)
    return head, hidden, labels


def test_gradients_may_be_taken_again_and_differentiated(head):
    head, hidden, labels = head
    inputs = [hidden, *head.parameters()]
    direction = [torch.randn_like(t) for t in inputs]

    def curvature(loss):
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, direction, strict=True)), inputs)

    got = losses.linear_cross_entropy(hidden, head, labels)
    expected = cross_entropy(head(hidden), labels)
    for _ in range(2):
        for one, other in zip(
            *(torch.autograd.grad(2 * loss, inputs, retain_graph=True) for loss in (got, expected)), strict=True
        ):
            torch.testing.assert_close(one, other)
    for one, other in zip(
        curvature(losses.linear_cross_entropy(hidden, head, labels)), curvature(expected), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_confident_predictions_keep_their_gradients_in_bfloat16(head):
    head, hidden, labels = head
    with torch.no_grad():
        head.weight.normal_(std=3)
        hidden.copy_(3 * head.weight[labels.clamp(min=0)])
    inputs = [hidden, head.weight]
    exact = torch.autograd.grad(cross_entropy(head(hidden).double(), labels), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.linear_cross_entropy(hidden, head, labels)
        plain = cross_entropy(head(hidden).float(), labels)
    found, expected = (torch.autograd.grad(t, inputs) for t in (loss, plain))
    for got, usual, right in zip(found, expected, exact, strict=True):
        assert (got - right).norm() < 2 * (usual - right).norm() + 1e-3 * right.norm()


def test_labels_out_of_range_are_refused(head):
    head, hidden, labels = head
    for wrong in (-1, 31):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            losses.linear_cross_entropy(hidden, head, labels.masked_fill(labels == labels[1], wrong))


def test_mixed_precision_gives_nearly_the_same_gradients(kind, input_ids, labels):
    model = tiny_model(kind).train()
    parameters = list(model.parameters())
    exact = torch.autograd.grad(model(input_ids, labels=labels).loss, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids, labels=labels).loss
    assert loss.dtype == torch.float32
    for got, expected in zip(torch.autograd.grad(loss, parameters), exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.05 * expected.norm() + 1e-3


def test_nothing_to_predict_is_no_nan(kind, input_ids):
    loss = tiny_model(kind).train()(input_ids, labels=torch.full_like(input_ids, -100)).loss
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize(("kind", "options"), [("bert", {}), ("gpt", {}), ("gpt", {"logits_to_keep": 3})])
def test_the_head_runs_once_for_logits_and_loss(kind, input_ids, labels, options):
    model, calls = tiny_model(kind), []
    expected = model(input_ids, labels=labels, skip_logits=True).loss
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: calls.append(module))
    torch.testing.assert_close(model(input_ids, labels=labels, **options).loss, expected)
    assert len(calls) == 1 + len(options)  # the last logits are not enough for the loss


def test_eval_with_labels_gives_all_logits(input_ids, labels):
    model = tiny_model("bert")
    out = model(input_ids, labels=labels)
    assert out.logits.shape == (2, 12, 99)
    torch.testing.assert_close(out.loss, cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    assert model(input_ids, labels=labels, skip_logits=True).logits is None
