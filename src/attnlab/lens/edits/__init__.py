"""What attention is made to do instead: edits for `lens.steer`, ways to decode. May import lens.measures and the tap."""
