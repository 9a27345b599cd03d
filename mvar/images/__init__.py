"""Where pictures come from: folders, lists and archives of images, how they are decoded and cut, arrays of pixels."""
