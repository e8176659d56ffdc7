"""Which heads do a task together: patching, overlap, codes of their outputs, injected tasks. May import the tap."""
