"""nanods: sparse attention, Mixture of Experts and multimodal contrastive learning, to be read."""
