# frozen_string_literal: true

# What both backends need to report raw request values in JSON, which knows UTF-8 only.

# A string of valid UTF-8 as itself, nil as nil; anything else (other bytes, arrays, hashes, files) as
# {"odd": how Ruby prints it}, so that it can't be mistaken for a string.
def printable(value)
  return value if value.nil?
  return { odd: value.inspect } unless value.is_a?(String)

  text = value.dup.force_encoding(Encoding::UTF_8)
  text.valid_encoding? ? text : { odd: value.b.inspect }
end
