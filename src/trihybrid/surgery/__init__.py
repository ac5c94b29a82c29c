"""Surgery: what will be done to a teacher (`plan`), and doing it (`operate`)."""
