"""What has been seen so far: counts of impressions and clicks, and the users' newest clicks.

Everything here is known at the end of a period and used from the next one on, so that no row can see itself.

Shape letters: N impressions, U users, A live ads, S traffics, K categories, L history length.
"""

from __future__ import annotations

import numpy as np

from rayfm.simulator.config import SimulatorConfig
from rayfm.simulator.world import Floats, Ints


class History:
    """Counts and sequences over the periods that have ended.

    Attributes:
        user_shown, user_clicked: ``[U, S]`` float32 counts by surface.
        ad_shown, ad_clicked: ``[A, S]`` float32 counts by surface, by position in the catalogue.
        user_category: ``[U, K]`` float32 clicks by category.
        clicked_ads, clicked_categories: ``[U, L]`` int64, the newest last, -1 where there are fewer.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        users, ads, surfaces = config.users, config.ads, len(config.traffics)
        self.user_shown = np.zeros((users, surfaces), np.float32)
        self.user_clicked = np.zeros((users, surfaces), np.float32)
        self.ad_shown = np.zeros((ads, surfaces), np.float32)
        self.ad_clicked = np.zeros((ads, surfaces), np.float32)
        self.user_category = np.zeros((users, config.categories), np.float32)
        self.clicked_ads = np.full((users, config.history_length), -1, np.int64)
        self.clicked_categories = np.full((users, config.history_length), -1, np.int64)

    def forget_ads(self, slots: Ints) -> None:
        """New ads begin at these positions of the catalogue: they have no past."""
        self.ad_shown[slots] = 0
        self.ad_clicked[slots] = 0

    def add(self, user: Ints, ad: Ints, ad_id: Ints, category: Ints, traffic: Ints, click: Floats) -> None:
        """Add a period's impressions, in time order; each argument ``[N]``, ``ad`` a position in the catalogue."""
        np.add.at(self.user_shown, (user, traffic), np.float32(1))
        np.add.at(self.user_clicked, (user, traffic), click)
        np.add.at(self.ad_shown, (ad, traffic), np.float32(1))
        np.add.at(self.ad_clicked, (ad, traffic), click)
        np.add.at(self.user_category, (user, category), click)
        clicked = np.flatnonzero(click > 0)
        self._push(user[clicked], ad_id[clicked], category[clicked])

    def _push(self, user: Ints, ad_id: Ints, category: Ints) -> None:
        """Append clicks to their users' sequences, dropping the oldest."""
        length = self.clicked_ads.shape[1]
        order = np.argsort(user, kind="stable")
        user, ad_id, category = user[order], ad_id[order], category[order]
        users, start, count = np.unique(user, return_index=True, return_counts=True)
        # Old and new clicks side by side, right-aligned: a user's last `length` columns are what stays.
        widest = int(count.max(initial=0))
        for sequences, new in ((self.clicked_ads, ad_id), (self.clicked_categories, category)):
            both = np.full((len(users), length + widest), -1, np.int64)
            shift = widest - count
            columns = np.arange(length) + shift[:, None]
            np.put_along_axis(both, columns, sequences[users], axis=1)
            row = np.repeat(np.arange(len(users)), count)
            place = np.arange(len(user)) - np.repeat(start, count)
            both[row, length + shift[row] + place] = new
            sequences[users] = both[:, -length:]
