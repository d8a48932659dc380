"""Evaluation: tasks, runner, statistics, results and reports."""
