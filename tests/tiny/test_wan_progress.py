"""What a training keeps in the repository is what it goes on from."""

from pathlib import Path

import torch
from tiny_training.fit import Trainer
from tiny_training.fit_wan import TinyWan, WanPlan
from tiny_training.progress import keep, take_up
from tiny_training.wan_parts import build_wan_vae


def test_a_training_goes_on_from_its_averaged_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    build_wan_vae().save_pretrained(tmp_path / "work" / "vae")
    plan = WanPlan(steps=3, save_every=3, warmup=1)
    trainer = Trainer(TinyWan(), plan, tmp_path / "work" / "wan.pt")
    for _ in range(3):
        for parameter in trainer.parameters:
            parameter.grad = torch.randn_like(parameter)
        trainer.update()
    trainer.save()
    assert keep(tmp_path / "work", tmp_path / "kept") == 3
    other = Trainer(TinyWan(), plan, tmp_path / "other.pt")
    take_up(other, tmp_path / "kept")
    assert other.step == 3
    for own, want in zip(other.parameters, trainer.averaged, strict=True):
        torch.testing.assert_close(own.data, want, atol=1e-3, rtol=1e-3)
    assert not torch.equal(trainer.parameters[0], trainer.averaged[0])
    assert str(tmp_path) not in (tmp_path / "kept" / "vae" / "config.json").read_text()
