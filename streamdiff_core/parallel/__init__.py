"""Pipeline orchestration: the layers of one transformer spread over several processes (paper §4, SPEC §6)."""
