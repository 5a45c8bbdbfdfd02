"""Routes for operators: status, metrics and the console."""
