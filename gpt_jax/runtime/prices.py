"""Hourly on-demand list prices of accelerators, before taxes and discounts. This module does not depend on JAX.

Prices change and differ between regions, so each has its date, region and source; a price that the user gives takes precedence.
The prices of TPUs are for a chip, and those of GPUs are an eighth of the price of a node with eight GPUs.

- TPUs: Google's page "Cloud TPU pricing" as copied into gpuhunt (github.com/dstackai/gpuhunt, resources/tpu_pricing.json,
  changed in December 2024). The catalog that SkyPilot makes from Google's billing service has the same prices for these regions
  (github.com/skypilot-org/skypilot-catalog, catalogs/v8/gcp/vms.csv at commit 006059e).
- A100 and H100: AWS, nodes p4d.24xlarge (21.957642 an hour), p4de.24xlarge (27.44705) and p5.48xlarge (55.04), as listed by
  github.com/datareceipts/data-receipts, 109-gpu-pricing/hyperscalers.json.
- H200: AWS, node p5en.48xlarge (63.296), as shown in github.com/dstackai/dstack/pull/4110.
- B200: Lambda, for nodes with eight, as copied from lambda.ai/instances by github.com/api-evangelist/lambda-labs,
  plans/lambda-labs-plans-pricing.yml.

No source was found for TPU7x, for L4, or for B200 in a cloud that also has TPUs.
"""

from typing import NamedTuple


class ListPrice(NamedTuple):
    """The published price of one chip."""

    dollars: float
    """US dollars per chip-hour."""
    source: str
    """The provider."""
    region: str
    date: str
    """When the source was last changed or read: year and month, or the full date."""


LIST_PRICES = {
    "TPU v4": ListPrice(3.22, "Google Cloud", "us-central2", "2024-12"),
    "TPU v5 lite": ListPrice(1.20, "Google Cloud", "us-central1", "2024-12"),
    "TPU v5": ListPrice(4.20, "Google Cloud", "us-east5", "2024-12"),
    "TPU v6 lite": ListPrice(2.70, "Google Cloud", "us-east5", "2024-12"),
    "NVIDIA A100-SXM4-40GB": ListPrice(21.957642 / 8, "AWS", "us-east-1", "2026-11-09"),
    "NVIDIA A100-SXM4-80GB": ListPrice(27.44705 / 8, "AWS", "us-east-1", "2026-11-09"),
    "NVIDIA H100 80GB HBM3": ListPrice(55.04 / 8, "AWS", "us-east-1", "2026-11-09"),
    "NVIDIA H200": ListPrice(63.296 / 8, "AWS", "us-east-1", "2026-08-06"),
    "NVIDIA B200": ListPrice(6.69, "Lambda", "all regions", "2026-09-20"),
}
"""Prices by `device_kind` in JAX. Kinds without a trustworthy source are not listed."""
