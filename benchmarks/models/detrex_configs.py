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
    "conditional-detr": "conditional_detr/configs/conditional_detr_r50_50ep.py",
    "group-detr": "group_detr/configs/group_detr_r50_50ep.py",
    "align-detr": "align_detr/configs/aligndetr_k=2_r50_4scale_12ep.py",
    "focus-detr": "focus_detr/configs/focus_detr_resnet/focus_detr_r50_4scale_12ep.py",
    "dino-eva": "dino_eva/configs/dino-eva-02/dino_eva_02_vitdet_b_4attn_1024_lrd0p7_4scale_12ep.py",
    # whose assignment by IoU takes more proposals of a level than small images have: its twin without
    "deta-matched": "deta/configs/improved_deformable_detr_baseline_50ep.py",
}
# Of these the training calls .cuda(), whatever the device.
CALL_CUDA = ("dino", "dn-detr", "align-detr", "focus-detr", "dino-eva")
# Of these the code has this width of its own, and no other.
ONLY_WIDTH = {"focus-detr": 256}
