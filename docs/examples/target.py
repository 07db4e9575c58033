"""Add a target: the most confident share of a class's voxels."""

import torch
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.targets import Case, Score, Target, WeightedScore, need_map, resolve_class


class MostConfident(Target):
    """``s(P) = Σ_v m(v) P(c, v)`` with m the voxels whose logit of class c is largest.

    Args:
        class_index: the class c, a number or a name.
        share: of all voxels, in (0, 1].
    """

    class_index: int | str
    share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: give a number in (0, 1]")

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """One score; its mask is frozen from the unperturbed prediction.

        Raises:
            TargetError: no such class, or a network that classifies whole images.
        """
        need_map(prediction, self)
        index, class_name = resolve_class(self.class_index, len(prediction), case.class_names)
        logits = prediction[index]
        count = max(1, round(self.share * logits.numel()))
        mask = logits >= logits.flatten().topk(count).values[-1]
        label = f"{self.name}-{class_name}"
        return [WeightedScore(mask, index, len(prediction), label=label, class_name=class_name)]


if __name__ == "__main__":
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Tanh()).double()
    image = torch.rand(1, 1, 10, 10, dtype=torch.float64, requires_grad=True)
    (attribution,) = Explainer(network)(image.detach(), ["Saliency(abs=False)"], [MostConfident(1, share=0.2)])

    score = network(image)[0, 1].flatten().topk(20).values.sum()  # 20 of 100 voxels, and their gradient
    (gradient,) = torch.autograd.grad(score, image)
    torch.testing.assert_close(attribution.map.as_tensor(), gradient[0])
    value, voxels = attribution.record["value"], attribution.record["target_voxels"]
    assert abs(value - score.item()) < 1e-12, (value, score.item())
    print(f"{attribution.label}: {voxels} voxels, F(x) = {value:.6f}")
