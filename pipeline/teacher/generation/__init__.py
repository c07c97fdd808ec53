"""Responses that the teacher writes itself: plan, engines, files, the loop that writes them."""
