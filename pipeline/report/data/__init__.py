"""Finished runs to the records that the report is made from."""
