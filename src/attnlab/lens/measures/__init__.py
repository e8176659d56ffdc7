"""What is seen of attention, as numbers: pure functions of tensors. May import lens.event and what lies below lens."""
