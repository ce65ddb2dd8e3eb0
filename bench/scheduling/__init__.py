"""What `python -m bench rollout` compares with: scheduler, detector and simulator again, plainly and
slowly; and the stream of events that schedulers are timed on."""
