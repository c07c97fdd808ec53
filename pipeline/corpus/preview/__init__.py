"""The first rows as the teacher will read them, shown before anything is run or written."""
