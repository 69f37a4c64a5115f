"""The core decides what its naive twin decides, for every policy and any sequence of events."""

from hypothesis import settings
from machine import CoreMachine

TestCore = CoreMachine.TestCase
TestCore.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
