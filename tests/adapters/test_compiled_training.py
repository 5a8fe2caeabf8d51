"""A training step that torch.compile has compiled: the same losses and gradients, in few graphs.

``DFINE_COMPILE=inductor`` compiles to machine code, and every host of transformers; without it one host is traced, with
its gradients, and run as it is.
"""

import os

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from dfine_plugin import wrap_decoder

from .hosts import build, idle_parameters, images, labels, randomise_fdr
from .transformers_hosts import HOSTS, TransformersHost

BACKEND = os.environ.get("DFINE_COMPILE", "aot_eager")
COMPILED = [pytest.param(host, id=str(host)) for host in (HOSTS if "DFINE_COMPILE" in os.environ else HOSTS[:1])]
MOST_BREAKS = 12
"""Of graphs in a step. The checks of truths and the loss are the plugin's; what looks at values before, such as where
denoising queries lie, is the host's, and would be so bare, whose RT-DETR has 23 with its loss."""
BREAKS = {"rt-detr-v2": 15, "grounding-dino": 16, "mm-grounding-dino": 16}
"""Of hosts that look at more values themselves: bare they have 27 and 32."""


@pytest.mark.slow
@pytest.mark.parametrize("host", COMPILED)
# machine code draws denoising queries from other random numbers, unless told
@torch._inductor.config.patch(fallback_random=True)
def test_a_compiled_step_is_the_same(host: TransformersHost) -> None:
    if host.missing:
        pytest.skip(host.missing)
    model = wrap_decoder(build(host), host.config()).train()
    randomise_fdr(host, model)
    found = []
    torch._dynamo.reset()
    counters.clear()
    for step in (model, torch.compile(model, backend=BACKEND)):
        model.zero_grad()
        torch.manual_seed(5)  # of denoising queries
        loss = host.loss(step, images(), labels())
        loss.backward()
        found.append(
            (loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (wanted, gradients), (loss, ours) = found
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert ours.keys() >= gradients.keys()
    # what the host's own loss does not reach, but shares a graph with it, has zeros there and not None
    assert ours.keys() - gradients.keys() <= idle_parameters(host)
    assert not [name for name in ours.keys() - gradients.keys() if ours[name].any()]
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert float((ours[name] - gradient).norm()) <= 1e-3 * max(float(gradient.norm()), 1e-3 * largest), name
    assert 0 < sum(counters["graph_break"].values()) <= BREAKS.get(host.name, MOST_BREAKS)
