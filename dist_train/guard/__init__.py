"""What looks after an attempt: signals, the lock of the folder, a deadline, a watchdog for hangs."""
