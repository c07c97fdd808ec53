"""The report's words: names of measures, numbers as read, sentences, the terminal table."""
