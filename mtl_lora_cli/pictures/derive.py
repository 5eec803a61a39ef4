"""Maps that follow from other maps: normals from depth, edges from classes."""

from __future__ import annotations

import numpy as np

from mtl_lora_cli.pictures.values import UNKNOWN

WINDOW = 13  # pixels: the side of the square that a plane is fitted to
FIT = 0.02  # of the mean inverse depth: a plane that fits worse is no plane


def normals_from_depth(depth: np.ndarray, camera: tuple[float, ...]) -> np.ndarray:
    """Normals of planes fitted to inverse depth, float32 [H, W, 3]; NaN where no plane fits.

    1 / z = a x + b y + c over image-plane coordinates x = (u − cx) / fx, y = (v − cy) / fy is the plane
    a X + b Y + c Z = 1, fitted by least squares in 13 x 13 windows; the normal is −(a, b, c) normalised: it
    points at the camera.

    Args:
        depth: float [H, W], NaN where not known.
        camera: fx, fy, cx, cy as shares of width and height.
    """
    height, width = depth.shape
    fx, fy, cx, cy = camera
    known = np.isfinite(depth)
    inverse = np.divide(1.0, depth, out=np.zeros(depth.shape), where=known)
    v, u = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = ((u + 0.5) / width - cx) / fx, ((v + 0.5) / height - cy) / fy
    weight = _windows(known.astype(np.float64))

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(_windows(np.where(known, values, 0.0)) / np.maximum(weight, 1e-12))

    mx, my, mq = mean(x), mean(y), mean(inverse)
    xx, yy, xy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    xq, yq = mean(x * inverse) - mx * mq, mean(y * inverse) - my * mq
    qq = mean(inverse * inverse) - mq * mq
    determinant = xx * yy - xy * xy
    with np.errstate(divide="ignore", invalid="ignore"):
        a = (xq * yy - yq * xy) / determinant
        b = (yq * xx - xq * xy) / determinant
        c = mq - a * mx - b * my
        residual = np.sqrt(np.maximum(qq - a * xq - b * yq, 0)) / mq
        normal = -np.stack([a, b, c], axis=2)
        normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    good = known & (residual < FIT) & (weight > 0.5) & (determinant > 1e-12)
    return np.where(good[:, :, None], normal, np.nan).astype(np.float32)


def _windows(values: np.ndarray) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    return np.asarray(uniform_filter(values, WINDOW))


def edges_from_classes(classes: np.ndarray) -> np.ndarray:
    """1 where a pixel's stored value differs from that to its left or above it, else 0: float32 [H, W].

    NaN where a pixel is `UNKNOWN`: nothing is known of its borders.
    """
    unknown = classes == UNKNOWN
    found = np.zeros(classes.shape, dtype=bool)
    found[:, 1:] |= (classes[:, 1:] != classes[:, :-1]) & ~unknown[:, :-1]
    found[1:] |= (classes[1:] != classes[:-1]) & ~unknown[:-1]
    return np.where(unknown, np.float32(np.nan), found.astype(np.float32))
