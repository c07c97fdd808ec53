"""Settings of stage two, typed: the student, its training, its output; imports nothing heavy."""
