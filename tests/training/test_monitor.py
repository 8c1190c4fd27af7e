import json

import numpy as np

from paddle_dit.training.monitor import LOG, Monitor

FIGURES = {
    "images_per_second": 100.0,
    "images_per_second_per_card": 50.0,
    "tflops_per_card": 2.0,
    "data_wait": 0.125,
    "peak_memory_mib": 1234.0,
}


def test_a_resumed_log_has_every_step_once(tmp_path):
    (tmp_path / LOG).write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (10, 20, 30)) + '{"step": 4')
    with Monitor(tmp_path, total_steps=40, start_step=20, visualdl=tmp_path / "visualdl") as monitor:
        monitor.advance()
        monitor.record(30, {"loss": 2.0, **FIGURES})
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] == 2.0
    assert list((tmp_path / "visualdl").iterdir())


def test_other_ranks_write_nothing(tmp_path):
    with Monitor(tmp_path, 1, 0, enabled=False) as monitor:
        monitor.advance()
        monitor.record(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_figures_of_other_groups_are_told_apart_in_the_log_and_in_visualdl(tmp_path, monkeypatch):
    from visualdl import LogWriter

    tags = []
    monkeypatch.setattr(LogWriter, "add_scalar", lambda self, tag, value, step: tags.append((tag, value, step)))
    with Monitor(tmp_path, total_steps=4, start_step=0, visualdl=tmp_path / "visualdl") as monitor:
        monitor.record(2, {"loss": 0.5, **FIGURES})
        monitor.record(2, {"loss": 0.75, "loss_ema": 1.0}, group="eval")
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert lines == [{"step": 2, "loss": 0.5, **FIGURES}, {"step": 2, "eval_loss": 0.75, "eval_loss_ema": 1.0}]
    assert {("train/loss", 0.5, 2), ("eval/loss", 0.75, 2), ("eval/loss_ema", 1.0, 2)} <= set(tags)
    assert len(tags) == 3 + len(FIGURES)


def test_the_progress_bar_tells_speed_and_memory(tmp_path, capfd):
    with Monitor(tmp_path, total_steps=4, start_step=0, visualdl=tmp_path / "visualdl") as monitor:
        monitor.record(1, {"loss": 0.5, **FIGURES, "mfu": 0.25})
        monitor.advance()
    told = capfd.readouterr().err
    for figure in ("loss 0.5000", "100 images/s", "50 per card", "2 TFLOP/s", "wait 12%", "MFU 25%", "1,234 MiB"):
        assert figure in told


def test_the_progress_bar_of_a_run_on_images_tells_what_latents_would_bring(tmp_path, capfd):
    with Monitor(tmp_path, total_steps=4, start_step=0) as monitor:
        monitor.record(1, {"loss": 0.5, **FIGURES, "encoding": 0.4, "images_per_second_from_latents": 210.0})
        monitor.advance()
    assert "wait 12%, encoding 40%, 210 images/s if from latents, 1,234 MiB" in capfd.readouterr().err


def test_visualdl_can_be_left_out(tmp_path):
    with Monitor(tmp_path, total_steps=4, start_step=0) as monitor:
        monitor.add_image("samples", np.zeros((2, 2, 3), np.uint8), 1)
        monitor.record(1, {"loss": 1.0, **FIGURES})
    assert [path.name for path in tmp_path.iterdir()] == [LOG]
