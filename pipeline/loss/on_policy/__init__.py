"""What text that a student wrote allows beside the divergences: gradients of the written tokens."""
