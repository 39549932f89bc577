"""The tester: what loses connections, kills and stops processes, and then looks whether a job was lost."""
