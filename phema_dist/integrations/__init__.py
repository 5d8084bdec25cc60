"""Other people's training loops: each module needs the library that it is named after, and is imported by its users."""
