"""torch.compile takes the whole loss and the whole sampler as one graph, and keeps it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import small_flow, small_observation, small_policy

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # Dynamo looks at it
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script_method` is deprecated"
    ),  # Inductor uses it
]
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _strict():
    """Every recompilation is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def example(model, seed: int, *, text: int = 4):
    """Two cameras, one absent in row 0; padded text."""
    observation = small_observation(model, cameras=2, text=text, seed=seed)
    cameras, words = torch.ones(2, 2, dtype=torch.bool), torch.ones(2, text, dtype=torch.bool)
    cameras[0, 1], words[1, 1 + seed % 3 :] = False, False
    masked = replace(observation, image_mask=cameras, token_mask=words)
    return masked, small_flow(model, samples=2, seed=seed)


def losses_and_gradients(model, forward, seeds):
    """Two training steps' worth of numbers: the second must not compile anything."""
    results = []
    for seed in seeds:
        model.zero_grad(set_to_none=True)
        observation, flow = example(model, seed)
        loss = forward(observation, *flow)
        loss.mean().backward()
        results.append(loss)
        results += [p.grad for p in model.parameters() if p.requires_grad]
    return results


@pytest.mark.parametrize("kind", ["toy", "pi05"])
def test_loss_and_its_gradient_are_one_graph(kind):
    model = small_policy(kind)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = losses_and_gradients(model, model, (0, 1))
    got = losses_and_gradients(model, compiled, (0, 1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@torch.no_grad()
def test_sampling_is_one_graph():
    model = small_policy("toy")
    sample = torch.compile(model.sample, fullgraph=True, dynamic=False, backend="eager")
    for seed in (0, 1):
        observation, (_, noise, _) = example(model, seed)
        expected = model.sample(observation, noise[:, 0], 3)
        torch.testing.assert_close(sample(observation, noise[:, 0], 3), expected, **CLOSE)


def test_recompilation_is_noticed():
    """The guard of these tests can fail: another length is another graph."""
    double = torch.compile(lambda x: 2 * x, fullgraph=True, dynamic=False, backend="eager")
    double(torch.zeros(2))
    with pytest.raises(torch._dynamo.exc.RecompileError):
        double(torch.zeros(3))


def test_inductor_gives_the_same_loss():
    """The real thing, on one layer: most of the time goes to the C++ compiler."""
    model = small_policy("toy", *(f"model.joint.mixtures.{m}.depth=1" for m in ("vlm", "action")))
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for seed in (0, 1):
            observation, flow = example(model, seed)
            torch.testing.assert_close(
                compiled(observation, *flow), model(observation, *flow), **CLOSE
            )


def test_compiled_blocks_equal_eager_ones():
    """Regional compilation: the repeated layers alone, for training and sampling."""
    model, compiled = small_policy("pi05"), small_policy("pi05")
    compiled.compile_blocks(backend="aot_eager", dynamic=False)
    observation, (_, noise, _) = example(model, 1)
    # Prefix and suffix, last layer and others: a graph each, made once.
    with torch._dynamo.config.patch(error_on_recompile=False):
        results = [losses_and_gradients(m, m, (0,)) for m in (model, compiled)]
        with torch.no_grad():
            results += [[m.sample(observation, noise[:, 0], 2)] for m in (model, compiled)]
    for eager, ours in (results[:2], results[2:]):
        for a, b in zip(eager, ours, strict=True):
            torch.testing.assert_close(b, a, **CLOSE)
    losses_and_gradients(compiled, compiled, (2, 3))


def test_compiled_blocks_take_batches_of_every_size():
    """Training, then sampling by one and by many: more versions of a layer than Dynamo's 8."""
    model = small_policy("pi0")
    model.compile_blocks(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for rows in (2, 3):
            observation = small_observation(model, batch=rows)
            model(observation, *small_flow(model, samples=2, batch=rows)).mean().backward()
        for rows in (5, 1, 4, 2, 1):
            noise = small_flow(model, samples=1, batch=rows)[1][:, 0]
            with torch.no_grad():
                actions = model.sample(small_observation(model, batch=rows), noise, 2)
            assert actions.shape == noise.shape
