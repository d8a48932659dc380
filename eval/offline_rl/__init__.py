"""Offline RL on gymnasium MuJoCo: episodes, decision-transformer hosts, agents, rollouts and scores."""
