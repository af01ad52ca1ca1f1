"""The tree of tokens that a search appends to its prompts' rows of the cache, and what each of them sees."""

from __future__ import annotations

import torch


class AppendedTree:
    """Which appended cache slots the last token of each expansion sees; expansion 0 is the root, which sees none."""

    def __init__(self, device: torch.device) -> None:
        self.expansions = 1
        self.slots = 0
        self.visible = torch.zeros(1, 0, dtype=torch.bool, device=device)

    def append(
        self,
        prompt_length: torch.Tensor,
        parent: torch.Tensor,
        deepest: int,
        owner: torch.Tensor,
        row: torch.Tensor,
        slot: torch.Tensor,
        first_slot: torch.Tensor,
        last: torch.Tensor,
        longest: int,
        filled: int,
    ) -> torch.Tensor:
        """Add N expansions, of T tokens together, and say what the tokens see.

        Parameters
        ----------
        prompt_length : int64 [rows]
        parent : int64 [N], the expansion above, which may be a new one itself, up to `deepest` times over
        owner : int64 [T], whose token each is
        row, slot, first_slot : int64 [T], its row, its slot among the new ones, and that of its expansion's first token
        last : int64 [N], each expansion's last token
        longest : how many slots are new
        filled : how many there were before, the prompt's among them

        Returns
        -------
        bool [rows, 1, longest, filled + longest]: a token sees its prompt, its ancestors and itself; a padding slot
        sees the prompt.
        """
        end = self.slots + longest
        self._reserve(self.expansions + len(last), end)
        new = torch.arange(longest, device=row.device)
        chain = (new >= first_slot[:, None]) & (new <= slot[:, None])
        for _ in range(deepest + 1):  # parents of the same step first
            sees = self.visible[parent, :end]
            sees[:, self.slots :] |= chain[last]
            self.visible[self.expansions : self.expansions + len(last), :end] = sees
        sees = self.visible[parent[owner], :end]
        sees[:, self.slots :] |= chain

        prompt = filled - self.slots
        mask = torch.zeros(len(prompt_length), longest, filled + longest, dtype=torch.bool, device=row.device)
        mask[:, :, :prompt] = (torch.arange(prompt, device=row.device) < prompt_length[:, None])[:, None]
        mask.view(-1, filled + longest)[row * longest + slot, prompt:] = sees
        self.expansions += len(last)
        self.slots = end
        return mask[:, None]

    def _reserve(self, expansions: int, slots: int) -> None:
        have = self.visible.shape
        if expansions > have[0] or slots > have[1]:
            larger = self.visible.new_zeros(
                2 * expansions if expansions > have[0] else have[0], 2 * slots if slots > have[1] else have[1]
            )
            larger[: have[0], : have[1]] = self.visible
            self.visible = larger
