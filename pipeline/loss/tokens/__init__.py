"""What single tokens count for and are worth, beside the loss.

`weights` (how much each token of a step counts, by what the cache knows of it), `acceptance`
(how often the teacher would accept the student's token).
"""
