"""Words that stops and lines of generated route tasks are called; without hyphens and brackets, which a route uses."""

__all__ = ["LINE_NAMES", "STOP_NAMES"]

LINE_NAMES = "Amber Azure Coral Ivory Jade Onyx Pearl Ruby Saffron Slate Teal Violet".split()
"""Names of lines."""

STOP_NAMES = (
    "Acorn Alder Anchor Anvil Apple Arch Ash Aspen Aster Badger Barley Basin Beacon Beech Bell Birch Bramble Brick "
    "Bridge Briar Brook Canal Castle Cedar Cellar Chalk Cherry Clover Copper Cove Crane Creek Crown Dale Delta Depot "
    "Dune Eagle Elder Elm Falcon Fern Ferry Field Finch Fjord Flint Forge Fountain Fox Gable Garden Gate Glen Grove "
    "Harbour Hazel Heath Heron Hill Hollow Holly Iris Island Juniper Kiln Knoll Lagoon Lantern Larch Lark Laurel "
    "Ledge Lemon Lily Linden Lodge Magnet Maple Market Marsh Meadow Mill Mint Moss Museum Myrtle Nettle Oak Oasis "
    "Orchard Osprey Otter Palm Park Pebble Pier Pine Plaza Pond Poplar Port Quarry Quay Raven Reed Ridge River Robin "
    "Rose Rowan Sage Sorrel Spire Spring Square Station Stone Sundial Swan Thistle Tower Tulip Valley Vine Walnut Well "
    "Willow Yarrow Yew"
).split()
"""Names of stops."""
