"""Tables, pages and figures from finished runs."""
