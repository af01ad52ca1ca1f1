"""Configuration of the simulated world. Nothing heavy is imported here."""

from __future__ import annotations

from pydantic import Field, model_validator

from recommender.config import StrictModel


class WorldConfig(StrictModel):
    """A world of items, users and habits whose next-item probabilities are known."""

    seed: int = Field(0, ge=0, description="Everything is drawn from it.")
    items: int = Field(5000, ge=40, le=2_000_000, description="Size of the catalogue.")
    users: int = Field(6000, ge=1, description="Number of users.")
    kinds: int = Field(40, ge=2, le=200, description="Kinds of product: tent, lamp, …")
    brands: int = Field(60, ge=2, le=2000, description="Brands; each makes some of the kinds.")
    uses: int = Field(6, ge=1, le=10, description="Audiences: for kids, for travel, …")
    min_length: int = Field(5, ge=3, description="Shortest sequence of a user; two items are held out.")
    mean_length: float = Field(14, ge=3, description="Mean length of a sequence (geometric above the shortest).")
    max_length: int = Field(60, ge=3, description="Longest sequence.")
    zipf: float = Field(0.9, ge=0, le=2, description="Exponent of popularity, of items within a kind and of kinds.")
    habit: float = Field(0.75, ge=0, lt=1, description="Share of choices that follow a habit: what comes after what.")
    taste: float = Field(0.2, ge=0, lt=1, description="Share of choices after the user's taste; the rest: popularity.")
    followers: int = Field(2, ge=1, description="Kinds that may follow a kind by habit.")
    tastes: int = Field(2, ge=1, description="Kinds that a user likes at a time.")
    drift: float = Field(0.03, ge=0, le=1, description="Chance at each choice that a liked kind or the brand changes.")
    brand_loyalty: float = Field(
        40.0, ge=1, le=10_000, description="How many times likelier an item of the user's brand is."
    )
    use_loyalty: float = Field(
        30.0, ge=1, le=10_000, description="How many times likelier an item for the user's use is."
    )

    @model_validator(mode="after")
    def _fits(self) -> WorldConfig:
        if self.habit + self.taste >= 1:  # or a user may have bought all that habit and taste allow
            raise ValueError(
                f"habit + taste is {self.habit + self.taste:g}; it must be below 1 (the rest is popularity)"
            )
        if not self.min_length <= self.mean_length <= self.max_length:
            raise ValueError("lengths must rise: min_length ≤ mean_length ≤ max_length")
        if self.max_length > self.items // 2:
            raise ValueError(f"max_length {self.max_length} leaves too little to choose from {self.items} items")
        if self.kinds > self.items:
            raise ValueError(f"kinds ({self.kinds}) must be at most items ({self.items})")
        if max(self.followers, self.tastes) > self.kinds:
            raise ValueError(f"followers and tastes must be at most kinds ({self.kinds})")
        return self
