"""Who draws which images of an evaluation, on ranks that are played one after the other."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddle_dit.config import DiTConfig
from paddle_dit.models.dit import DiT
from paddle_dit.training import drawn_figures
from paddle_dit.training.data_parallel import DataParallel
from paddle_dit.training.drawn_figures import DrawnFigures
from paddle_dit.training.plan import make_plan
from paddle_dit.training.ranks import Ranks
from paddle_dit.training.recipe import TrainRecipe
from tests.training.test_drawn_figures import EVALUATION, write_store


@dataclass(frozen=True)
class Placed(Ranks):
    """A rank whose fellows are played one after the other: what each sends is kept, and given to all the next time."""

    sent: tuple = ()

    def any(self, *facts):
        return list(facts)

    def from_main(self, value):
        return value

    def let_main(self, work, fact=lambda: False):
        if self.is_main:
            work(lambda: False)

    def gather(self, tensor):
        rounds = self.sent[0][self.rank]
        rounds.append(tensor)
        number = len(rounds) - 1
        return [self.sent[1][rank][number] if self.sent[1] else tensor for rank in range(self.world_size)]


class Collected:
    """A judge that only keeps what it is given."""

    about = "nothing"

    def load(self, shape, still_here):
        self.shape = shape
        return []

    def begin(self):
        self.images = []

    def add(self, images):
        self.images.append(images)

    def finish(self, still_here):
        return drawn_figures.Judgement({"seen": 1.0}, "seen", [])


@pytest.mark.parametrize(("world_size", "degree", "count"), [(3, 1, 20), (5, 1, 4), (4, 2, 21), (4, 4, 7)])
def test_every_rank_draws_its_share_and_all_images_come_in_order(tmp_path, monkeypatch, world_size, degree, count):
    monkeypatch.setattr(drawn_figures, "_BATCH", 3)
    paddle.seed(0)
    model = DiT(DiTConfig.from_preset("DiT-Digits/2"))
    for weight in model.parameters():  # the initial zeros would predict no noise at all
        weight.set_value(0.05 * paddle.randn(weight.shape))
    model.eval()
    options = {**EVALUATION, "eval_samples": count, "progress_bar": False}
    options |= {"feature_path": write_store(tmp_path / "latents"), "global_batch_size": 16, "dry_run": True}
    plan = make_plan(TrainRecipe(model="DiT-Digits/2", **options))
    predicted = []

    def predict(*inputs):
        predicted[-1].append(len(inputs[0]))
        return model(*inputs)

    step = SimpleNamespace(predict=predict)
    session = SimpleNamespace(step=step, parallel=DataParallel(), go_on=lambda: None, asked_to_stop=False)

    def images_of(ranks):
        judge = Collected()
        predicted.append([])
        found = DrawnFigures(plan, ranks, judge if ranks.is_main else None).measure(session)
        assert (found is not None) == ranks.is_main
        return np.concatenate(judge.images) if ranks.is_main else None

    alone = images_of(Ranks())
    assert alone.shape == (count, 32, 32, 3)
    assert len(np.unique(alone.reshape(count, -1), axis=0)) == count
    former = []
    for _ in range(2):
        del predicted[:]
        sent = [[] for _ in range(world_size)]
        together, *_ = [images_of(Placed(rank, world_size, degree, (sent, former))) for rank in range(world_size)]
        former = sent
    assert len(set(map(tuple, predicted))) == 1  # all run the model equally often, on equally many
    assert sum(predicted[0]) < 3 * (count + 3 * world_size // degree) * degree / world_size + 9
    assert np.abs(together.astype(int) - alone).max() <= 1
