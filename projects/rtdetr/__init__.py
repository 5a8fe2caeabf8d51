"""RT-DETR and RT-DETRv2 of their authors' own repository, wrapped, by the repository's own trainer."""
