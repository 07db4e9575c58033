"""Write results as DICOM beside the NIfTI files: parametric map, segmentation of the target, picture.

They belong to the patient and the study of the source series and lie in its frame of reference. Written with highdicom
(Bridge et al. 2022, doi:10.1007/s10278-022-00683-y).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from esegeta_monai import __version__
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.dicom import DICOM_SUFFIXES
from esegeta_monai.utils.files import atomic

__all__ = ["DicomSource", "check_dicom_writer", "dicom_path"]

_MAKER = "esegeta_monai"
_SCHEME = "99ESEGETA"
"""A private coding scheme (names begin with 99): no public one has a code for attributions."""


def check_dicom_writer() -> None:
    """Check that highdicom is installed.

    Raises:
        UsageError: it is not.
    """
    if not optional_import("highdicom")[1]:
        raise UsageError('map format dicom: writing DICOM needs highdicom: pip install "esegeta-monai[dicom]"')


def dicom_path(path: str | os.PathLike[str], channel: int | None = None, *, picture: bool = False) -> Path:
    """Return the path of a DICOM file beside a NIfTI file.

    Args:
        path: of the map or mask.
        channel: number of the channel from 0, where a map has several.
        picture: True for that of the picture.

    >>> dicom_path("a/a_b_Saliency_attr.nii.gz").name, dicom_path("a/a_b_mask.nii.gz", 1).name
    ('a_b_Saliency_attr.dcm', 'a_b_mask_2.dcm')
    """
    path = Path(path)
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    return path.with_name(f"{stem}{'_picture' if picture else ''}{'' if channel is None else f'_{channel + 1}'}.dcm")


class DicomSource:
    """The series that results belong to.

    Args:
        scan: a folder with one series, or a file of one slice.

    Raises:
        InputError: the scan is no DICOM series, or a slice has no place in the patient.
    """

    def __init__(self, scan: Any) -> None:
        from esegeta_monai.files.dicom import check_series

        self.slices: list[Any] = []
        path = Path(scan) if isinstance(scan, (str, os.PathLike)) else None
        if path is None or not (path.is_dir() or path.name.lower().endswith(DICOM_SUFFIXES)):
            name = "an array" if path is None else path.name
            raise InputError(
                f"{name}: map format dicom needs a DICOM series, whose patient, study and geometry they take over: "
                "give the folder of the series, or write NIfTI (map format nifti)"
            )
        import pydicom

        itk, has_itk = optional_import("itk")
        if not has_itk:
            raise InputError(f'{path.name}: reading DICOM needs ITK: pip install "esegeta-monai[itk]"')
        files = check_series(path, itk) if path.is_dir() else [str(path)]
        self.slices = [pydicom.dcmread(f, stop_before_pixels=True) for f in files]
        needed = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "StudyInstanceUID"]
        needed += ["FrameOfReferenceUID", "SOPInstanceUID", "Rows", "Columns"]
        missing = [n for n in needed if any(n not in s for s in self.slices)]
        if missing:
            raise InputError(
                f"{path.name}: map format dicom: the series has no {', '.join(missing)}, so maps have no place in "
                "the patient: export it again, or write NIfTI (map format nifti)"
            )
        for s in self.slices:  # highdicom copies these; DICOM requires that they are present, if only empty
            for n in (
                "PatientID",
                "PatientName",
                "PatientBirthDate",
                "PatientSex",
                "StudyID",
                "StudyDate",
                "StudyTime",
            ):
                if n not in s:
                    setattr(s, n, "")
            for n in ("AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"):
                if n not in s:
                    setattr(s, n, "")
            if not s.get("SliceThickness"):  # optional in CT and MR, required in multi-frame objects
                s.SliceThickness = self._distance()

    def _distance(self) -> float:
        """Return the distance of the first two slices; of a single one, its voxel size."""
        places = np.array([[float(n) for n in s.ImagePositionPatient] for s in self.slices[:2]])
        return float(np.linalg.norm(places[-1] - places[0])) or min(float(n) for n in self.slices[0].PixelSpacing)

    def frames(self, values: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Return volumes (x, y, z) of the scan's grid as frames (slices, rows, columns) in the order of the series.

        Args:
            values: (x, y, z), or (x, y) for one slice.
            affine: voxel to world (RAS mm), 4x4.

        Raises:
            InputError: the grid is not that of the series.
        """
        volume = values.reshape(*values.shape[:2], -1)
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        first = self.slices[0]
        rows, columns = (float(n) for n in first.PixelSpacing)
        along = np.array(first.ImageOrientationPatient, dtype=float)
        plane = np.stack([along[:3] * columns, along[3:] * rows], 1)
        places = np.array([[*map(float, s.ImagePositionPatient), 1.0] for s in self.slices])
        index = (np.linalg.inv(to_lps) @ places.T).T[:, :3]
        near = np.rint(index[:, 2]).astype(int)
        fits = volume.shape == (first.Columns, first.Rows, len(self.slices))
        fits = fits and np.allclose(to_lps[:3, :2], plane, atol=1e-3 * min(rows, columns))
        fits = fits and np.allclose(index, np.stack([0 * near, 0 * near, near], 1), atol=2e-2)
        if not (fits and sorted(near) == list(range(len(self.slices)))):
            raise InputError(
                "map format dicom: the map is not on the grid of the DICOM series (shape, orientation or positions "
                "differ): write NIfTI (map format nifti)"
            )
        return np.ascontiguousarray(volume[:, :, near].transpose(2, 1, 0))

    def save_map(
        self, path: Path, values: np.ndarray, affine: np.ndarray, *, method: str, units: str, target: str, limit: float
    ) -> Path:
        """Write a map (x, y, z) as Parametric Map with float32 values; the real-world value is the stored one.

        Args:
            path: from `dicom_path`.
            values, affine: see `frames`.
            method, units, target: for the descriptions; DICOM cuts them to 64 characters.
            limit: half the width of the display window.

        Raises:
            InputError: see `frames`; or the series lacks what DICOM requires.
        """
        import highdicom
        from pydicom.sr.codedict import codes
        from pydicom.sr.coding import Code

        frames = self.frames(values.astype(np.float32), affine)
        low, high = float(frames.min()), float(frames.max())
        mapping = highdicom.pm.RealWorldValueMapping(
            lut_label=method[:16],
            lut_explanation=f"{method}, {units}"[:64],
            unit=codes.UCUM.NoUnits,
            value_range=(low, max(high, float(np.nextafter(low, np.inf)))),
            slope=1.0,
            intercept=0.0,
            quantity_definition=Code("attribution", _SCHEME, "Attribution of a network's output"),
        )
        made = self._made(
            highdicom.pm.ParametricMap,
            frames,
            ["map", method, target, frames.tobytes()],
            contains_recognizable_visual_features=True,  # the outline of a head can identify a patient
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[
                highdicom.VOILUTTransformation(
                    window_center=0.0 if low < 0 else limit / 2,
                    window_width=(2 if low < 0 else 1) * limit or 1.0,
                    voi_lut_function="LINEAR_EXACT",  # LINEAR needs a width of at least 1
                )
            ],
            content_label="ATTRIBUTION",
            content_description=f"{method} of {target}"[:64],
        )
        made.SeriesDescription = f"{method} of {target}"[:64]
        return self._save(path, made)

    def save_mask(self, path: Path, values: np.ndarray, affine: np.ndarray, *, target: str) -> Path:
        """Write the voxels of a target (x, y, z), True or 1, as binary Segmentation.

        Args:
            path, values, affine, target: see `save_map`.
        """
        import highdicom
        from pydicom.sr.codedict import codes
        from pydicom.sr.coding import Code

        frames = (self.frames(values, affine) > 0.5).astype(np.uint8)
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name=_MAKER, version=__version__, family=codes.cid7162.ArtificialIntelligence
        )
        segment = highdicom.seg.SegmentDescription(
            segment_number=1,
            segment_label=target[:64],
            segmented_property_category=Code("309825002", "SCT", "Spatial and Relational Concept"),
            segmented_property_type=Code("target", _SCHEME, "Target of an explanation"),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        made = self._made(
            highdicom.seg.Segmentation,
            frames,
            ["mask", target, frames.tobytes()],
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            omit_empty_frames=bool(frames.any()),
            content_label="TARGET",
            content_description=target[:64],
        )
        made.SeriesDescription = f"Target {target}"[:64]
        return self._save(path, made)

    def save_picture(self, path: Path, picture: Path, *, title: str) -> Path:
        """Write a picture file as Secondary Capture in colour.

        Args:
            path: from `dicom_path`.
            picture: the PNG file.
            title: the series description.
        """
        import highdicom
        from PIL import Image

        with Image.open(picture) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        own: dict[str, Any] = self._identifiers(["picture", title, pixels.tobytes()])
        try:
            made: Any = highdicom.sc.SCImage.from_ref_dataset(
                self.slices[0],
                pixel_array=pixels,
                photometric_interpretation="RGB",
                bits_allocated=8,
                coordinate_system="PATIENT",
                patient_orientation=("L", "P"),
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                series_number=self._series_number(2),
                manufacturer=_MAKER,
                instance_number=1,
                **own,
            )
        except (AttributeError, ValueError, TypeError) as error:
            raise _refused(error) from error
        del made.PatientOrientation  # the picture shows several planes
        made.PatientOrientation = ""
        made.BurnedInAnnotation = "YES"  # it has the name of the case
        made.SeriesDescription = title[:64]
        return self._save(path, made)

    def _made(self, kind: Any, frames: np.ndarray, parts: Sequence[Any], **more: Any) -> Any:
        try:
            return kind(
                source_images=self.slices,
                pixel_array=frames,
                series_number=self._series_number(0 if parts[0] == "map" else 1),
                instance_number=1,
                manufacturer=_MAKER,
                manufacturer_model_name=_MAKER,
                software_versions=__version__,
                device_serial_number="0",
                **self._identifiers(parts),
                **more,
            )
        except (AttributeError, ValueError, TypeError) as error:
            raise _refused(error) from error

    def _identifiers(self, parts: Sequence[Any]) -> dict[str, str]:
        """Return UIDs that depend on the source and the contents only: a repeated run makes the same objects."""
        import hashlib

        from pydicom.uid import generate_uid

        content = [p.hex() if isinstance(p, bytes) else str(p) for p in parts]
        key = hashlib.sha256("\n".join([str(self.slices[0].SOPInstanceUID), *content]).encode()).hexdigest()
        return {f"{n}_instance_uid": str(generate_uid(entropy_srcs=[n, key])) for n in ("series", "sop")}

    def _series_number(self, kind: int) -> int:
        return 1000 + 10 * int(self.slices[0].get("SeriesNumber") or 0) + kind

    def _save(self, path: Path, made: Any) -> Path:
        """Write an object; images have the laterality of the series, empty if unknown (segmentations may not)."""
        if made.Modality != "SEG":
            made.Laterality = self.slices[0].get("Laterality") or self.slices[0].get("ImageLaterality") or ""
        with atomic(path) as temporary:
            made.save_as(temporary)
        return path


def _refused(error: Exception) -> InputError:
    text = " ".join(str(error).split())[:200]
    return InputError(
        f"map format dicom: highdicom refuses the series ({type(error).__name__}: {text}): write NIfTI (map format "
        "nifti), or complete the series"
    )
