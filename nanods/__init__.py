"""nanods: sparse attention, Mixture of Experts and multimodal contrastive learning, written to be read."""
