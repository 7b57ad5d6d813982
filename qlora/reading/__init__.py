"""Files of every kind -> sections of text that know their headings and their place in the file."""
