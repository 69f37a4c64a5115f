"""The table that engines read, while a core takes in random events: each cell counts the chunks whose names give it."""

import os
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import settings
from hypothesis.stateful import invariant
from machine import CoreMachine

from kvcore.live import held
from kvcore.live.held import HeldTable, HeldView
from kvcore.policy import Core


class HeldMachine(CoreMachine):
    def core_class(self, config):
        self.folder = tempfile.TemporaryDirectory(prefix="kvcore-held-")
        self.table = HeldTable(Path(self.folder.name, "kvcore-x.held"))
        self.view = HeldView.attach(self.table.path, self.table.token)
        core = Core(config)
        self.table.follow(core)
        return core

    @invariant()
    def every_cell_counts_its_chunks(self):
        if not hasattr(self, "core"):
            return
        wanted = Counter(held._cell(chunk) for tier in self.core.tiers for chunk in tier.resident)
        assert Counter({cell: self.table._cells[cell] for cell in wanted}) == wanted
        held_chunks = {chunk for tier in self.core.tiers for chunk in tier.resident}
        assert all(self.view.may_hold(chunk) for chunk in held_chunks)
        assert self.table._cells[held._HEADER_BYTES :].count(b"\0") == held._CELLS - len(wanted)

    def teardown(self):
        super().teardown()
        if hasattr(self, "table"):
            self.view.close()
            self.table.close()
            assert os.listdir(self.folder.name) == []
            self.folder.cleanup()


HeldMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_the_table_follows_the_core = HeldMachine.TestCase
