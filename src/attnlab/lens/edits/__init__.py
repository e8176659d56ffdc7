"""What attention is made to do instead: edits for `lens.steer`, ways to decode. May import measures and the tap."""
