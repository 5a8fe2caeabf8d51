"""Which hosts of detrex there are."""

# From a host's name to detrex's own config.
CONFIGS = {
    "deformable-detr": "deformable_detr/configs/deformable_detr_r50_with_box_refinement_50ep.py",
    "deformable-detr-two-stage": "deformable_detr/configs/deformable_detr_r50_two_stage_50ep.py",
    "h-deformable-detr": "h_deformable_detr/configs/h_deformable_detr_r50_two_stage_12ep.py",
    "dab-deformable-detr": "dab_deformable_detr/configs/dab_deformable_detr_r50_50ep.py",
    "dn-deformable-detr": "dn_deformable_detr/configs/dn_deformable_detr_r50_12ep.py",
    "dino": "dino/configs/dino-resnet/dino_r50_4scale_12ep.py",
    "dab-detr": "dab_detr/configs/dab_detr_r50_50ep.py",
    "dn-detr": "dn_detr/configs/dn_detr_r50_50ep.py",
}
# Of these the training calls .cuda(), whatever the device.
CALL_CUDA = ("dino", "dn-detr")
