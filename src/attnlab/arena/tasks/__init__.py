"""The tasks, one file each, on data that comes with installed packages. They import `arena.task` and `arena.ends`."""
