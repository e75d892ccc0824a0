"""What runs leave on disk: their folders, what is read from them, and what makes two of them alike."""
