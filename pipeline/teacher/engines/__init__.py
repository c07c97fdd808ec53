"""Whatever runs the teacher: vLLM or transformers behind one Protocol."""
