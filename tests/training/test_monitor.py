import json

from paddle_dit.training.monitor import LOG, Monitor


def test_a_resumed_log_has_every_step_once(tmp_path):
    (tmp_path / LOG).write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (10, 20, 30)) + '{"step": 4')
    with Monitor(tmp_path, total_steps=40, start_step=20) as monitor:
        monitor.advance()
        monitor.record(30, {"loss": 2.0, "images_per_second": monitor.images_per_second()})
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] == 2.0
    assert list((tmp_path / "visualdl").iterdir())


def test_other_ranks_write_nothing(tmp_path):
    with Monitor(tmp_path, 1, 0, enabled=False) as monitor:
        monitor.advance()
        monitor.record(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
