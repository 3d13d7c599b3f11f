"""`gsr.ops.splat` on its own: fit Gaussians to a photograph by gradient descent.

python docs/fit_photograph.py assets/demo.png fitted.png [STEPS]
"""

import sys

import torch

from gsr.io.image import read_image, to_tensor, to_uint8, write_image
from gsr.ops import splat

photo = to_tensor(read_image(sys.argv[1]))  # [1, 3, H, W] in [0, 1]
size = photo.shape[-2:]
h, w, k = size[0] // 6, size[1] // 6, 2  # a grid of cells of 6 x 6 pixels, 2 Gaussians each
torch.manual_seed(0)
colour = torch.rand(1, k, 3, h, w, requires_grad=True)
shape = torch.zeros(1, k, 6, h, w)  # sigma (2), offset (2), rho, opacity before their bounds
shape[:, :, 2:4].uniform_(-1, 1)
shape.requires_grad_()
adam = torch.optim.Adam([{"params": colour, "lr": 0.03}, {"params": shape, "lr": 0.06}])
for step in range(int(sys.argv[3]) + 1 if len(sys.argv) > 3 else 301):
    sigma, offset = 0.1 + 0.5 * shape[:, :, :2].sigmoid(), 0.7 * shape[:, :, 2:4].tanh()
    rho, opacity = 0.9 * shape[:, :, 4].tanh(), shape[:, :, 5].sigmoid()
    image = splat(colour, sigma, rho, opacity, size, offset, radius=1, eps=1e-3)
    mse = (image - photo).square().mean()
    adam.zero_grad()
    mse.backward()
    adam.step()
    if step % 50 == 0:
        print(f"step {step}: {-10 * mse.log10().item():.2f} dB")
write_image(sys.argv[2], to_uint8(image.detach()))
