"""D-FINE of Hugging Face transformers is FDR already and no host to wrap; but its FDR head is ours by another name."""

from torch import nn
from transformers import DFineForObjectDetection

from dfine_plugin.config import FDRConfig
from dfine_plugin.head import FDRHead


def fdr_head_of(model: DFineForObjectDetection) -> FDRHead:
    """A D-FINE's FDR head as an :class:`FDRHead` of the same settings, with a copy of its weights.

    From the same initial boxes and hidden states it gives the same boxes, and the same location quality. D-FINE counts
    offsets in units of c: its ``up`` is a, its ``reg_scale`` 1 / c.

    Args:
        model: a D-FINE.

    Raises:
        ValueError: its heads are of other sizes than the paper's.
    """
    decoder = model.model.decoder
    bins = {"num_bins": decoder.max_num_bins, "a": abs(decoder.up.item()), "c": 1 / abs(decoder.reg_scale.item())}
    head = FDRHead(decoder.d_model, len(decoder.bbox_embed), FDRConfig.paper(**bins)).to(decoder.up)
    theirs = [layer.reg_conf for layer in decoder.lqe_layers]
    for ours, host in [*zip(head.refine, decoder.bbox_embed, strict=True), *zip(head.quality, theirs, strict=True)]:
        linears = [module for module in ours.modules() if isinstance(module, nn.Linear)]
        shapes = [[tuple(linear.weight.shape) for linear in layers] for layers in (linears, host.layers)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"this D-FINE's heads are of other sizes than the paper's: {shapes[1]}, not {shapes[0]}")
        for linear, source in zip(linears, host.layers, strict=True):
            linear.load_state_dict(source.state_dict())
    return head.train(model.training)
